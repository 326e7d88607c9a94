# find_package(ashore): the targets ashore::ashore, a shared library, and ashore::static.
get_filename_component(_ashore_lib "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)
get_filename_component(_ashore_include "${_ashore_lib}/../include" ABSOLUTE)
if(NOT EXISTS "${_ashore_include}/ashore.h")
  # A library directory of the architecture: lib/x86_64-linux-gnu.
  get_filename_component(_ashore_include "${_ashore_lib}/../../include" ABSOLUTE)
endif()
set(_ashore_system "pthread" "m" "${CMAKE_DL_LIBS}")
if(NOT TARGET ashore::ashore AND EXISTS "${_ashore_lib}/libashore.so")
  add_library(ashore::ashore SHARED IMPORTED)
  set_target_properties(ashore::ashore PROPERTIES
    IMPORTED_LOCATION "${_ashore_lib}/libashore.so" IMPORTED_SONAME "libashore.so.1"
    INTERFACE_INCLUDE_DIRECTORIES "${_ashore_include}")
endif()
if(NOT TARGET ashore::static AND EXISTS "${_ashore_lib}/libashore.a")
  add_library(ashore::static STATIC IMPORTED)
  set_target_properties(ashore::static PROPERTIES
    IMPORTED_LOCATION "${_ashore_lib}/libashore.a" INTERFACE_LINK_LIBRARIES "${_ashore_system}"
    INTERFACE_INCLUDE_DIRECTORIES "${_ashore_include}")
endif()
