"""What only converting needs: smoothing, searches and rounding for a layer's output."""
