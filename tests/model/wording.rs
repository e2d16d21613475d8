//! How names are shown: as they are.

pub(crate) fn name(name: &str) -> &str {
    name
}
