"""Every private PyTorch name that this package uses, each behind a function that says what it is for.

One file for each part of PyTorch. When a release moves a name, these are the only files to mend;
`tests/torch_private` names which.
"""
