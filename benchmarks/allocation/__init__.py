"""What allocating rank by measurement is worth on trained models."""
