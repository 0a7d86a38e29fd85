"""Float to INT8: per token, per group of a token, or by a given scale. Formulas: ``quantize.h``."""
