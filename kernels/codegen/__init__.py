"""From an elementwise region of an FX graph to the source of a Triton kernel.

    FX nodes --(elementwise)--> sympy expression --(formula)--> text, derivatives --(triton_source)--> a .py file

The text of a formula is all that travels in a graph: an op that carries it needs nothing else to be run, differentiated
or generated again in another process.
"""
