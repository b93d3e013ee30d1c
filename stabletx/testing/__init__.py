"""Hold any attention to the laws: a float64 reference, computed tolerances, adversarial cases."""
