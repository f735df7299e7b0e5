"""What surrounds a run: files, downloads, signals, the console, the machine and its software.

Nothing here knows reviews or models, and nothing imports the other packages.
"""
