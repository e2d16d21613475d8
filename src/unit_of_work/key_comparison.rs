//! The comparison of keys. The database decides which keys are equal, and may regard keys as equal that differ in Rust.

use std::any::{TypeId, type_name};
use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;

use super::entity::Entity;

/// The rows of these keys, in the order of the keys. A row may come back with another spelling of its key than the
/// requested one. If so, the keys without a row are queried again in halves, until each row is assigned to its key.
pub(super) fn find_by_keys<Id, T, E>(
    ids: &[Id],
    many: &mut impl FnMut(&[Id]) -> Result<Vec<T>, E>,
    one: &mut impl FnMut(&Id) -> Result<Option<T>, E>,
) -> Result<Vec<Option<T>>, E>
where
    Id: Clone + Eq + Hash + 'static,
    T: Entity<Id = Id>,
{
    let mut rows: HashMap<Id, T> = many(ids)?.into_iter().map(|row| (row.id(), row)).collect();
    let mut found: Vec<Option<T>> = ids.iter().map(|id| rows.remove(id)).collect();
    let missing: Vec<usize> = (0..ids.len()).filter(|&index| found[index].is_none()).collect();
    if missing.is_empty() || is_exact::<Id>() {
        return Ok(found);
    }
    let mut unassigned = vec![missing];
    while let Some(mut indices) = unassigned.pop() {
        if let [index] = indices[..] {
            found[index] = one(&ids[index])?;
            continue;
        }
        let requested: Vec<Id> = indices.iter().map(|&index| ids[index].clone()).collect();
        if !many(&requested)?.is_empty() {
            let half = indices.split_off(indices.len() / 2);
            unassigned.extend([indices, half]);
        }
    }
    Ok(found)
}

/// Whether every database compares keys of this type as Rust does.
pub(super) fn is_exact<Id: 'static>() -> bool {
    let exact = [
        TypeId::of::<i16>(),
        TypeId::of::<i32>(),
        TypeId::of::<i64>(),
        TypeId::of::<u8>(),
        TypeId::of::<u16>(),
        TypeId::of::<u32>(),
        TypeId::of::<u64>(),
    ];
    exact.contains(&TypeId::of::<Id>()) || type_name::<Id>() == "uuid::Uuid"
}

/// A key without letter case and blanks, which a database may ignore in comparisons. Keys that the database regards as
/// equal have the same normalized key. Other keys may share it.
pub(super) fn normalized_key(key: &impl fmt::Debug) -> String {
    let mut text = format!("{key:?}").to_lowercase();
    text.retain(|c| c != ' ');
    text
}
