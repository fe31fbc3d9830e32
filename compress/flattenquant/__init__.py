"""FlattenQuant (arXiv 2402.17985): large input channels are split until one scale a layer suffices."""
