//! References, registry client, content-addressed store, OCI layout and docker-archive in and out.
