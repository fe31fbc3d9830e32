"""Engines that sample from the target, behind one interface (`base.Engine`)."""
