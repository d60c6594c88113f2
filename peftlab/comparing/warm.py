"""Imported by the fork server: the libraries that every cell needs, and nothing that computes."""

import sys

try:
    import peft  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import transformers  # noqa: F401

    import peftlab.execute  # noqa: F401
except KeyboardInterrupt:
    # Who started the server heard it too, and answers.
    sys.exit(130)
