//! The store on Kubernetes' node objects against an API server that does as it is told.
