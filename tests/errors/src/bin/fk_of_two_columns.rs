//~ the key of `Room` has several columns, so `Fk<Room>` cannot be a foreign key of one column
//~ name a foreign key of several columns on the struct
use diesel::prelude::*;
use diesel_session::Entity;

diesel::table! { rooms (house, number) { house -> Integer, number -> Integer, } }
diesel::table! { beds (id) { id -> Integer, room -> Integer, } }

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(primary_key(house, number))]
pub struct Room {
    pub house: i32,
    pub number: i32,
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[entity(new = NewBed)]
pub struct Bed {
    #[entity(generated)]
    pub id: i32,
    #[entity(references = Room)]
    pub room: i32,
}

fn main() {}
