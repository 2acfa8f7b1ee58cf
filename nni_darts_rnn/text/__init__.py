"""Text as numbers: words and their ids, published corpora, batches, and the perplexities of models that only count words."""
