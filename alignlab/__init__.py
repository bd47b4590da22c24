"""alignlab: which alignment algorithm should I use, and how far is it from the best that is possible?"""

__version__ = "0.1.0"
