"""Placeholder until sae.steer lands."""


def steering_example(run, report):
    raise NotImplementedError
