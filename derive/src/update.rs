//! The UPDATE of several rows and the locks, on databases that have such statements.

use proc_macro2::TokenStream;
use quote::quote;

use crate::backends::{Backend, support_path};
use crate::model::Model;

/// Maximum number of parameters in PostgreSQL's protocol.
const MAX_BINDS: usize = 65_535;

/// The items of `Persist` for several rows. Only PostgreSQL can return which rows an UPDATE has found: SQLite's
/// `RETURNING` cannot return columns of the list, and MariaDB has no `RETURNING` for an UPDATE.
pub(crate) fn many(model: &Model, backend: Backend, connection: &TokenStream) -> TokenStream {
    if backend != Backend::Postgres || model.row_by_row {
        return TokenStream::new();
    }
    let support = support_path();
    let table = &model.table;
    let values = model.fields.len();
    let keys = model.keys().map(|key| {
        let (column, field) = (&key.column, &key.name);
        quote!(update.key(#table::#column, rows.iter().map(|(old, _)| &old.#field));)
    });
    let version = model.version().map(|version| {
        let (column, field) = (&version.column, &version.name);
        quote!(update.version(#table::#column, rows.iter().map(|(old, _)| &old.#field));)
    });
    let sets = model.updatable().map(|(index, written)| {
        let (column, field) = (&written.column, &written.name);
        quote! {
            if (columns & (1u128 << #index)) != 0 {
                update.set(#table::#column, rows.iter().map(|(_, new)| &new.#field));
            }
        }
    });
    let update_many = model.updatable().next().is_some().then(|| quote! {
        const MAX_UPDATE_ROWS: usize = #support::max_update_rows(#values, #MAX_BINDS);

        fn update_many(
            conn: &mut #connection,
            rows: &[(&Self, &Self)],
            columns: u128,
        ) -> ::diesel::QueryResult<::std::vec::Vec<usize>> {
            let mut update = #support::UpdateMany::new(#table::table, rows.len());
            #(#keys)*
            #version
            #(#sets)*
            let found: ::std::vec::Vec<i32> = ::diesel::RunQueryDsl::load(update, conn)?;
            ::core::result::Result::Ok(found.into_iter().filter_map(|row| ::core::primitive::usize::try_from(row).ok()).collect())
        }
    });
    let (locks, lock_keys) = (
        MAX_BINDS / model.key.len().max(1),
        model.keys().map(|key| {
            let (column, field) = (&key.column, &key.name);
            quote!(lock.key(#table::#column, rows.iter().map(|row| &row.#field));)
        }),
    );
    quote! {
        #update_many

        const MAX_LOCK_ROWS: usize = #locks;

        fn may_lock(conn: &mut #connection) -> ::diesel::QueryResult<bool> {
            let mut may: ::std::vec::Vec<bool> = ::diesel::RunQueryDsl::load(#support::MayLock(#table::table), conn)?;
            ::core::result::Result::Ok(may.pop().unwrap_or(true))
        }

        fn lock(conn: &mut #connection, rows: &[&Self], for_delete: bool) -> ::diesel::QueryResult<()> {
            let mut lock = #support::LockRows::new(#table::table, rows.len(), for_delete);
            #(#lock_keys)*
            ::diesel::RunQueryDsl::execute(lock, conn).map(::core::mem::drop)
        }
    }
}
