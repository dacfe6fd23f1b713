"""Post-training compression of a finished model, `bigtrain compress`: cut, prune, quantize, and measure each."""
