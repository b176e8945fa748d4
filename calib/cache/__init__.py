"""Feature caching across denoiser calls: policies, corrections and what they are fitted on, as numerics on arrays."""
