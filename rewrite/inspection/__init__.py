"""Model → :class:`~rewrite.inspection.inspection.Inspection`: what a checkpoint is, what is wrong, who is affected."""
