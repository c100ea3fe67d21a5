//! The saved state of one device: a kind, a version and bytes.
//!
//! A device keeps its saved types in `mod saved { pub struct V1 {..} }`, apart from the live ones, and `save` destructures the live state
//! exhaustively, so that a forgotten field does not compile. The bytes are postcard's.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The state of one device.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Payload {
    /// What kind of device wrote it, such as `uart16550`.
    pub kind: String,
    /// The version of the kind's format, from 1.
    pub version: u32,
    /// The state.
    pub bytes: Vec<u8>,
}

/// Why a saved state was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The state is of another kind of device, or of a version that this program does not know.
    #[error(
        "this is the state of {found} version {found_version}, wanted {wanted} version {wanted_version}"
    )]
    Kind {
        /// The kind in the payload.
        found: String,
        /// The version in the payload.
        found_version: u32,
        /// The kind of the device.
        wanted: &'static str,
        /// The version that it understands.
        wanted_version: u32,
    },
    /// The bytes do not decode, or some are left over.
    #[error("the state of {kind} is damaged: {why}")]
    Damaged {
        /// The kind of the device.
        kind: &'static str,
        /// What is wrong.
        why: String,
    },
}

impl Payload {
    /// Encodes `state`.
    ///
    /// # Panics
    /// If `state` has a shape that cannot be encoded, which is a bug of the device.
    pub fn encode<T: Serialize>(kind: &'static str, version: u32, state: &T) -> Payload {
        let bytes = postcard::to_stdvec(state)
            .unwrap_or_else(|e| panic!("the state of {kind} cannot be encoded: {e}"));
        Payload {
            kind: kind.into(),
            version,
            bytes,
        }
    }

    /// Decodes a state of exactly this kind and version; leftover bytes are an error.
    pub fn decode<T: DeserializeOwned>(
        &self,
        kind: &'static str,
        version: u32,
    ) -> Result<T, RestoreError> {
        if self.kind != kind || self.version != version {
            return Err(RestoreError::Kind {
                found: self.kind.clone(),
                found_version: self.version,
                wanted: kind,
                wanted_version: version,
            });
        }
        let damaged = |why| RestoreError::Damaged { kind, why };
        let (state, rest) =
            postcard::take_from_bytes(&self.bytes).map_err(|e| damaged(e.to_string()))?;
        match rest.len() {
            0 => Ok(state),
            n => Err(damaged(format!("{n} bytes are left over"))),
        }
    }
}
