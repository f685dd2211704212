"""``python -m gathering_pipeline`` is the command ``gathering-pipeline``."""

from gathering_pipeline.cli import main

if __name__ == "__main__":
    main()
