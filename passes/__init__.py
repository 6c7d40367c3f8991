"""The passes, one module each, in chapters; `README.md` states their invariants, `compiler/pipeline.py` their order."""
