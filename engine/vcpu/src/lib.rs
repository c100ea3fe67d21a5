//! lodger-vcpu
