//! lodger-virtio-devices
