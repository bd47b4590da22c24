"""What the study of performance is made of: the work, the clocks, the two sides, the parts and the report."""
