"""`python -m hf_dp` -> what `hf-dp` does."""

from hf_dp.cli import main

if __name__ == "__main__":
    main()
