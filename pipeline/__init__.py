"""The parts of the MR-MAE pipeline. No part knows a stage; see docs/architecture.md for who may import whom."""
