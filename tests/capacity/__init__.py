"""Drivers and the actuator, beside real programs and an emulated BMC; no time passes but ours."""
