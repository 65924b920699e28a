"""The model files that the CPU image is checked with, for SGLang to import first.

SGLang imports all its model files (258 in 0.5.23) before it looks up the one that it serves,
0.8 s of every scheduler's start. Where ``SGLANG_EXTERNAL_MODEL_PACKAGE`` names a package,
0.5.23 imports that one's files first and its own only for an architecture that they do not
have. The files here offer SGLang's own classes and nothing else, so what is served is the
same. 0.5.20 and older import all files in any case.
"""
