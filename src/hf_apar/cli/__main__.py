"""``python -m hf_apar.cli`` is ``hf-apar``."""

from hf_apar.cli import main

if __name__ == "__main__":
    main()
