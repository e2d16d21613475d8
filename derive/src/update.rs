//! The UPDATE of several rows at once, where the database has one.

use proc_macro2::TokenStream;
use quote::quote;

use crate::backends::Backend;
use crate::model::Model;

/// As many parameters as PostgreSQL's protocol can count.
const BINDS: usize = 65_535;

/// What it adds to `Persist`. Only PostgreSQL has such a statement that tells which of the rows were there: SQLite's `RETURNING` gives
/// nothing of the list, and MariaDB has none for an UPDATE.
pub(crate) fn many(model: &Model, backend: Backend, connection: &TokenStream) -> TokenStream {
    if backend != Backend::Postgres || model.row_by_row {
        return TokenStream::new();
    }
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
    let sets = model.written().map(|(index, written)| {
        let (column, field) = (&written.column, &written.name);
        quote! {
            if (columns & (1u128 << #index)) != 0 {
                update.set(#table::#column, rows.iter().map(|(_, new)| &new.#field));
            }
        }
    });
    let update_many = model.written().next().is_some().then(|| quote! {
        const MAX_UPDATE_ROWS: usize = ::diesel_session::unit_of_work::derive_support::max_update_rows(#values, #BINDS);

        fn update_many(
            conn: &mut #connection,
            rows: &[(&Self, &Self)],
            columns: u128,
        ) -> ::diesel::QueryResult<::std::vec::Vec<usize>> {
            let mut update = ::diesel_session::unit_of_work::derive_support::UpdateMany::new(#table::table, rows.len());
            #(#keys)*
            #version
            #(#sets)*
            let there: ::std::vec::Vec<i32> = ::diesel::RunQueryDsl::load(update, conn)?;
            ::core::result::Result::Ok(there.into_iter().filter_map(|row| ::core::primitive::usize::try_from(row).ok()).collect())
        }
    });
    let (locks, lock_keys) = (
        BINDS / model.key.len().max(1),
        model.keys().map(|key| {
            let (column, field) = (&key.column, &key.name);
            quote!(lock.key(#table::#column, rows.iter().map(|row| &row.#field));)
        }),
    );
    quote! {
        #update_many

        const MAX_LOCK_ROWS: usize = #locks;

        fn may_lock(conn: &mut #connection) -> ::diesel::QueryResult<bool> {
            let mut may: ::std::vec::Vec<bool> = ::diesel::RunQueryDsl::load(::diesel_session::unit_of_work::derive_support::MayLock(#table::table), conn)?;
            ::core::result::Result::Ok(may.pop().unwrap_or(true))
        }

        fn lock(conn: &mut #connection, rows: &[&Self], for_delete: bool) -> ::diesel::QueryResult<()> {
            let mut lock = ::diesel_session::unit_of_work::derive_support::LockRows::new(#table::table, rows.len(), for_delete);
            #(#lock_keys)*
            ::diesel::RunQueryDsl::execute(lock, conn).map(::core::mem::drop)
        }
    }
}
