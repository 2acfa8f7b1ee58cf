"""Text as numbers: words and their ids, published corpora, batches, and what counting models make of them."""
