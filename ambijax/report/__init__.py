"""Run directories -> one page to look at, and its figures as files: `python -m ambijax.report RUN [RUN ...]`."""
