//! What a container is on the host: bundle, state, sandbox, supervisor.
