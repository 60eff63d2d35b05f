"""Files that change a model: low-rank changes of weights, and learnt words. None of them imports torch."""

STYLES = ("diffusers", "kohya")  # whose names a LoRA file has
WORD_STYLES = ("diffusers", "a1111")  # and a learnt word's
