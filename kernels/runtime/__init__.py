"""What every kernel stands on: dispatch, proofs, launching, operators, autograd, Dynamo."""
