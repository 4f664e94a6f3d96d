"""Reading result files and turning them into tables and figures.

Everything here works on files alone: nothing is trained and torch is never imported. The chain is
`load` (result files to tables) -> `statistics` (tests) -> `tables` (CSV, Markdown) and one module
per figure.
"""
