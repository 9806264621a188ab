"""The target: a stock Hugging Face causal LM that scores draft trees."""
