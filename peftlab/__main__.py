"""``python -m peftlab``, which is also what ``accelerate launch -m peftlab`` runs."""

from peftlab.cli import main

if __name__ == "__main__":
    main(prog_name="peftlab")
