"""Model to graph: tracing, exact passes, quantization sites, lowering, and the sampler tracer."""
