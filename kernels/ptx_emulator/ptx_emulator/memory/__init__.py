"""Checked memory: global and shared, mbarriers, tensor maps, and who may touch what when."""
