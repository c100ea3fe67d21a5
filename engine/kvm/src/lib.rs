//! lodger-kvm
