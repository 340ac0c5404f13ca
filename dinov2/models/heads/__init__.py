"""Task heads: what turns the tokens of several blocks into classes, masks, depth or boxes."""
