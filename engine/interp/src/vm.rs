//! What the vCPUs of one VM share: RAM, the clock, mailboxes, and stopping each other.
