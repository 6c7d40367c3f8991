"""The passes, one module each, in chapters; `README.md` states their invariants, `compiler/pipeline.py` their order."""

if __name__ == "passes":
    import os
    import runpy

    _folder = os.path.join(os.path.dirname(os.path.dirname(__file__)), "kernels")
    runpy.run_path(os.path.join(_folder, "stand_aside.py"))["stand_aside"](__name__, __file__)
