//! lodger-virtio
