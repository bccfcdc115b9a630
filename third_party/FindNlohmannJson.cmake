# Finds the header-only JSON library: a CMake package, a system header, or the PyPI wheel
# `nlohmann-json` of the Python that drives the build.
include(FindPackageHandleStandardArgs)

find_path(NlohmannJson_INCLUDE_DIR nlohmann/json.hpp)
if(NOT NlohmannJson_INCLUDE_DIR)
  find_package(Python3 QUIET COMPONENTS Interpreter)
  foreach(_python IN ITEMS "${Python_EXECUTABLE}" "${PYTHON_EXECUTABLE}" "${Python3_EXECUTABLE}")
    if(_python AND NOT NlohmannJson_INCLUDE_DIR)
      execute_process(
        COMMAND "${_python}" -c
          "import importlib.util as u; print(u.find_spec('nlohmann_json').submodule_search_locations[0])"
        OUTPUT_VARIABLE _wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      find_path(NlohmannJson_INCLUDE_DIR nlohmann/json.hpp HINTS "${_wheel}/include")
    endif()
  endforeach()
endif()

find_package_handle_standard_args(NlohmannJson
  REQUIRED_VARS NlohmannJson_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "install it with: pip install nlohmann-json (or the package nlohmann-json3-dev)")
if(NlohmannJson_FOUND AND NOT TARGET NlohmannJson::NlohmannJson)
  add_library(NlohmannJson::NlohmannJson INTERFACE IMPORTED)
  set_target_properties(NlohmannJson::NlohmannJson PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${NlohmannJson_INCLUDE_DIR}")
endif()
