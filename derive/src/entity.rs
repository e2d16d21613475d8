//! `#[derive(Entity)]`.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::spanned::Spanned;
use syn::{DeriveInput, Result};

use crate::backends::Backend;
use crate::model::Model;
use crate::{new_entity, update};

pub(crate) fn derive(input: &DeriveInput) -> Result<TokenStream> {
    let model = Model::read(input)?;
    let entity = entity(&model);
    let persist = model.backends.each(|backend, connection| persist(&model, backend, connection));
    let new = new_entity::generated(&model);
    Ok(quote!(#entity #persist #new))
}

fn entity(model: &Model) -> TokenStream {
    let name = &model.name;
    let text = name.to_string();
    let (id_type, id) = {
        let types: Vec<_> = model.keys().map(|key| &key.ty).collect();
        let names: Vec<_> = model.keys().map(|key| &key.name).collect();
        match (&types[..], &names[..]) {
            ([ty], [name]) => (quote!(#ty), quote!(::core::clone::Clone::clone(&self.#name))),
            _ => (quote!((#(#types,)*)), quote!((#(::core::clone::Clone::clone(&self.#names),)*))),
        }
    };
    let versioned = model.version().is_some();
    let bump = model.version().map(|version| {
        let field = &version.name;
        quote!(self.#field += 1;)
    });
    let differences = model.written().map(|(at, field)| {
        let name = &field.name;
        let differs = quote_spanned!(field.ty.span()=> old.#name != new.#name);
        quote!(if #differs { columns |= 1u128 << #at; })
    });
    let unwritten = model.written().map(|(_, field)| {
        let name = &field.name;
        let equal = quote_spanned!(field.ty.span()=> base.#name == value.#name);
        quote!(if #equal { ::core::mem::swap(&mut value.#name, &mut newest.#name); })
    });
    let (same_version, newest_version) = match model.version() {
        Some(version) => {
            let field = &version.name;
            (quote!(self.#field == other.#field), quote!(::core::mem::swap(&mut value.#field, &mut newest.#field);))
        }
        None => (quote!(true), quote!()),
    };
    let parents: Vec<_> = model.fields.iter().filter_map(|field| Some((field.parent.as_ref()?, field))).collect();
    let parent_types = parents.iter().map(|(parent, _)| parent);
    let moved = parents.iter().filter(|(_, field)| !field.version).map(|(parent, field)| {
        let name = &field.name;
        quote!((parent == ::core::any::TypeId::of::<#parent>() && old.#name != new.#name))
    });
    let own =
        parents.iter().filter(|(parent, _)| parent.is_ident(name) || parent.is_ident("Self")).map(|(_, field)| {
            let name = &field.name;
            match field.is_optional() {
                true => quote!(keys.extend(::core::clone::Clone::clone(&self.#name));),
                false => quote!(keys.push(::core::clone::Clone::clone(&self.#name));),
            }
        });
    let counted = model.counted_key();
    let is_counted = counted.is_some();
    let of_number = match counted {
        Some(ty) => quote!(<#ty as ::core::convert::TryFrom<u64>>::try_from(number).ok()),
        None => quote!({
            let _ = number;
            ::core::option::Option::None
        }),
    };
    let row_by_row = model.row_by_row;
    quote! {
        impl ::diesel_session::Entity for #name {
            type Id = #id_type;
            const NAME: &'static str = #text;
            const VERSIONED: bool = #versioned;
            const COUNTED: bool = #is_counted;
            const ROW_BY_ROW: bool = #row_by_row;

            fn id(&self) -> Self::Id {
                #id
            }

            fn parents() -> ::std::vec::Vec<::core::any::TypeId> {
                ::std::vec![#(::core::any::TypeId::of::<#parent_types>()),*]
            }

            #[allow(clippy::float_cmp)]
            fn differences(old: &Self, new: &Self) -> u128 {
                let mut columns = 0u128;
                let _ = (old, new);
                #(#differences)*
                columns |= 0;
                columns
            }

            fn has_version_of(&self, other: &Self) -> bool {
                let _ = other;
                #same_version
            }

            #[allow(clippy::float_cmp)]
            fn take_unwritten(base: &Self, value: &mut Self, newest: &mut Self) {
                let _ = (base, &mut *value, &mut *newest);
                #(#unwritten)*
                #newest_version
            }

            fn bump_version(&mut self) {
                #bump
            }

            fn refers_anew(old: &Self, new: &Self, parent: ::core::any::TypeId) -> bool {
                let _ = (old, new, parent);
                false #(|| #moved)*
            }

            fn own_parents(&self) -> ::std::vec::Vec<Self::Id> {
                #[allow(unused_mut)]
                let mut keys = ::std::vec::Vec::new();
                #(#own)*
                keys
            }

            fn id_of_number(number: u64) -> ::core::option::Option<Self::Id> {
                #of_number
            }
        }
    }
}

fn persist(model: &Model, backend: Backend, connection: &TokenStream) -> TokenStream {
    let name = &model.name;
    let table = &model.table;
    let db = quote!(<#connection as ::diesel::Connection>::Backend);
    let traits = quote! {
        #[allow(unused_imports)]
        use ::diesel::{BoolExpressionMethods as _, ExpressionMethods as _, OptionalExtension as _, QueryDsl as _, RunQueryDsl as _};
    };
    let selection = quote!(<Self as ::diesel::SelectableHelper<#db>>::as_select());
    let columns: Vec<_> = model.keys().map(|key| &key.column).collect();
    let names: Vec<_> = model.keys().map(|key| &key.name).collect();
    let single = columns.len() == 1;
    let parts: Vec<_> = match single {
        true => vec![quote!(id)],
        false => (0..columns.len())
            .map(|at| {
                let at = syn::Index::from(at);
                quote!(&id.#at)
            })
            .collect(),
    };
    let (finds, find_many) = match single {
        true => {
            let column = columns[0];
            (1000_usize, quote!(#table::table.filter(#table::#column.eq_any(ids)).select(#selection).load(conn)))
        }
        false => {
            let (first, rest) = (&columns[0], &columns[1..]);
            let (first_part, rest_parts) = (&parts[0], &parts[1..]);
            (
                100_usize,
                quote! {
                    let mut query = #table::table.select(#selection).into_boxed();
                    for id in ids {
                        query = query.or_filter(#table::#first.eq(#first_part)#(.and(#table::#rest.eq(#rest_parts)))*);
                    }
                    query.load(conn)
                },
            )
        }
    };
    let of_version = |row: TokenStream| {
        model.version().map(|version| {
            let (column, field) = (&version.column, &version.name);
            quote!(.filter(#table::#column.eq(&#row.#field)))
        })
    };
    let update = {
        let places = model.written().map(|(at, _)| at);
        let set_columns: Vec<_> = model.written().map(|(_, field)| &field.column).collect();
        let set_names = model.written().map(|(_, field)| &field.name);
        let version = model.version().map(|version| {
            let (column, field) = (&version.column, &version.name);
            quote!(#table::#column.eq(old.#field + 1),)
        });
        let by_version = of_version(quote!(old));
        match set_columns.is_empty() {
            true => quote!({
                let _ = (conn, old, new);
                ::core::result::Result::Ok(1)
            }),
            false => quote! {{
                let columns = <Self as ::diesel_session::Entity>::differences(old, new);
                ::diesel::update(#table::table #(.filter(#table::#columns.eq(&old.#names)))* #by_version)
                    .set((
                        #((columns & (1u128 << #places) != 0).then(|| #table::#set_columns.eq(&new.#set_names)),)*
                        #version
                    ))
                    .execute(conn)
            }},
        }
    };
    let in_batches = single && model.version().is_none();
    let (deletes, delete) = match in_batches {
        true => {
            let (column, field) = (columns[0], names[0]);
            (
                1000_usize,
                quote!(::diesel::delete(#table::table.filter(#table::#column.eq_any(rows.iter().map(|row| &row.#field)))).execute(conn)),
            )
        }
        false => {
            let by_version = of_version(quote!(row));
            (
                1_usize,
                quote! {
                    let mut deleted = 0;
                    for row in rows {
                        deleted += ::diesel::delete(#table::table #(.filter(#table::#columns.eq(&row.#names)))* #by_version).execute(conn)?;
                    }
                    ::core::result::Result::Ok(deleted)
                },
            )
        }
    };
    let update_many = update::many(model, backend, connection);
    // Elsewhere a SELECT finds the newest row, or a transaction that would have to see another is refused.
    let find_newest = (backend == Backend::Mysql).then(|| {
        quote! {
            const LOCKS: bool = true;

            fn find_newest(conn: &mut #connection, id: &Self::Id) -> ::diesel::QueryResult<::core::option::Option<Self>> {
                #traits
                #table::table #(.filter(#table::#columns.eq(#parts)))* .select(#selection).for_update().get_result(conn).optional()
            }
        }
    });
    quote! {
        impl ::diesel_session::orm::Persist<#connection> for #name {
            const FINDS: usize = #finds;
            const DELETES: usize = #deletes;

            fn find(conn: &mut #connection, id: &Self::Id) -> ::diesel::QueryResult<::core::option::Option<Self>> {
                #traits
                #table::table #(.filter(#table::#columns.eq(#parts)))* .select(#selection).get_result(conn).optional()
            }

            #find_newest

            fn find_many(conn: &mut #connection, ids: &[Self::Id]) -> ::diesel::QueryResult<::std::vec::Vec<Self>> {
                #traits
                #find_many
            }

            fn update(conn: &mut #connection, old: &Self, new: &Self) -> ::diesel::QueryResult<usize> {
                #traits
                #update
            }

            #update_many

            fn delete(conn: &mut #connection, rows: &[&Self]) -> ::diesel::QueryResult<usize> {
                #traits
                #delete
            }
        }
    }
}
