"""Whether two networks compute the same: in float64, as they are stored, and site by site where the plan is known."""
