"""Imported by the fork server: the libraries that every cell needs, and nothing that computes."""

import gc
import sys

# Nothing that is imported goes away: to look for garbage meanwhile takes a tenth of the time.
gc.disable()
try:
    import sklearn.metrics  # noqa: F401
    import torch

    # PEFT and bitsandbytes ask for CUDA when they are imported, and a process that has asked cannot
    # be forked into one that uses it. Counting devices does not ask.
    if torch.cuda.device_count() == 0:
        import peft  # noqa: F401
        import transformers  # noqa: F401

        import peftlab.execute  # noqa: F401

    # A cell that collects garbage need not look through it, nor copy it. What of it is garbage
    # already stays: to find that would take half a second, and is next to no memory.
    gc.freeze()
except KeyboardInterrupt:
    # Who started the server heard it too, and answers.
    sys.exit(130)
finally:
    gc.enable()
