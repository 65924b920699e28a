"""An archive for a GPU host without network and Docker: SGLang, the harness and what they miss."""
