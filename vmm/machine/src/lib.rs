//! A virtual machine on KVM: memory, vCPUs, boot, devices, snapshots. It knows nothing of OCI.
